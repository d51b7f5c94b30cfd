"""The paper in miniature: plan, runs, records, claims, tables, figures and the report made of them."""
