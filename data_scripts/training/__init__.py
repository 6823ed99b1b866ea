"""How the denoisers that come with the library are trained; for the scripts beside this folder."""
