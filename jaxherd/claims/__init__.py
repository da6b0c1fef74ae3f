"""The ledger of claims: protocol, seeds, verdict, record."""
