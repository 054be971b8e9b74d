"""Measures hidden and exposed communication."""
