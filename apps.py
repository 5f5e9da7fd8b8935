"""The two Flower apps: ``server`` runs at the coordinator, ``client`` at every site.

The package ``client`` must not import ``simulation``, so the folders of simulated sites and the
generator of phantom data are passed to it here.
"""

from polyclinic.client.app import Simulated, client_app
from polyclinic.server.app import server_app
from polyclinic.simulation.local.sites import ledger_folder, memory_folder, phantom_root

server = server_app()
client = client_app(Simulated(phantom_root, ledger_folder, memory_folder))
