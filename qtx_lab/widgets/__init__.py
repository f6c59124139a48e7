"""Controls, live views and the dashboard: what people see."""
