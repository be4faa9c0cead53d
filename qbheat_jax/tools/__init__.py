"""For maintainers, and before a run. Nothing else imports from here."""
