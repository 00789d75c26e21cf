"""The cuda target: launch plans and cubins."""
