"""How the shipped toy world was learned: run these again to make it anew."""
