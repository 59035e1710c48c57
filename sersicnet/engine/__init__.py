"""Drawing and fitting of Sersic profiles, and correlated noise; shared by simulations and measurements."""
