"""The demo as a client of the library: its own form of table. The library does not import it."""
