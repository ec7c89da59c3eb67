"""How a run happens: configuration, plan, engines, lake, policy, report and the command line."""
