"""Drivers: how a virtual machine monitor is started, spoken to and ended."""
