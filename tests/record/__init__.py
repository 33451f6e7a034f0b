"""What gmask does today, recorded through its public names, so that a change of its inside can be held against it."""
