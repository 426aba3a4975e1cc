"""Types, errors, tree specs and argument checks that every room uses."""
