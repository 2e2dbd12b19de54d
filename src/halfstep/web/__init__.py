"""Pages in a browser on this machine: one small server and its guard, and what is shown by them."""
