"""A plugin with a method that keeps the whole contract, to be copied and spoilt by the tests."""
