"""A judge as files that others load."""
