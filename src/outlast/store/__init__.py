"""Named bytes: the object stores that repositories live on."""
