"""Settings: their schema, and the files and command lines they are read from."""
