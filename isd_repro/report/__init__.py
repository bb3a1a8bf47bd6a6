"""Reports: tables, figures and a page from committed records. Every printed number is computed here."""
