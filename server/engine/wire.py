"""Old names of `server.engine.messages`, until nothing imports them."""

from server.engine.messages import receive_message, send_message

receive, send = receive_message, send_message
