"""An open-loop load on a server, measured at the client's socket."""
