"""The site's policy, releases and approvals."""
