"""Being here puts this folder on the import path, so that tests in any sub-folder can ``import hosting``."""
