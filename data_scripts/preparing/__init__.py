"""What the scripts beside it share: fetching, unpacking, class folders, corrupted sets, phantoms to train on."""
