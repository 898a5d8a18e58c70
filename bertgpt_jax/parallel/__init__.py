"""The mesh and what lies where on it; the only folder that names mesh axes."""
