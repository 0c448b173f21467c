"""The Ray shell: processes, their starting order and their end. The only package that imports ray."""
