"""The two apps that Flower loads, and the one place where a room is handed what it must not import.

Flower starts ``server`` at the coordinator and ``client`` at every site, simulated or deployed. A
site's code knows no simulation; that a simulated site without data is a phantom hospital is
arranged here.
"""

from polyclinic.client.app import Simulated, client_app
from polyclinic.server.app import server_app
from polyclinic.simulation.local.sites import ledger_folder, memory_folder, phantom_root

server = server_app()
client = client_app(Simulated(phantom_root, ledger_folder, memory_folder))
