"""From a captured module to a graph whose states are touched by the operators on states alone."""
