"""The Sersic profile drawn and fitted, and the noise around it: simulations and measurements share it."""
