//! A typed client of the API, over TCP or a Unix socket.
