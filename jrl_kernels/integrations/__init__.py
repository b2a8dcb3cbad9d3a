"""Drop-ins for the libraries people train with. Each module needs its own library, and none is imported here."""
