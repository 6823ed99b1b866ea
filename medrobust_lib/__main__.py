"""``python -m medrobust_lib``: the command line where its script is not on the path."""

from medrobust_lib.cli import main

main()
