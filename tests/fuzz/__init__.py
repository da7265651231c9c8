"""Hostile input, generated: profiles and HTTP requests. ``make fuzz`` runs thousands, the tests here a few hundred."""
