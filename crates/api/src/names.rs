//! What a name, a slug, a port, a duration and a size class may look like.
