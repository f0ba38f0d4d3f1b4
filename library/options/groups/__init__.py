"""The option groups, one module per topic; nothing is imported here so that a script builds only the groups it has."""
