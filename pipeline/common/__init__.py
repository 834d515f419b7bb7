"""Shared by all rooms: console, files, randomness, the machine, stopping and suggestions. Imports from no other room."""
