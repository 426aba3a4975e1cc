"""The host side of a run: feeders, dispatch, and the fit, eval and predict loops."""
