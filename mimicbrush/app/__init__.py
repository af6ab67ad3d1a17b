"""Pages in the browser: the mask painter, served on this machine only."""
