"""`halfstep live`: a world that is made while somebody walks through it, in the browser."""
