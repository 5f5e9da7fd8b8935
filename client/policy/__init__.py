"""What the site allows: its policy, releases and approvals."""
