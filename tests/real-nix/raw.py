"""raw.py SOCKET OPERATION ARGUMENT...: one request of Nix's worker protocol (1.37) and nothing before it but the handshake
and the options, for what no command of Nix asks without asking for validity first.

  add-text NAME TEXT REFERENCE...   AddToStore, method text:sha256; prints the path
  sign PATH SIGNATURE               AddSignatures
  outputs DRV                       QueryDerivationOutputMap; prints NAME PATH lines
"""
import socket
import struct
import sys

LAST, ERROR, NEXT, START, STOP, RESULT = 0x616C7473, 0x63787470, 0x6F6C6D67, 0x53545254, 0x53544F50, 0x52534C54
stream = socket.socket(socket.AF_UNIX)
stream.connect(sys.argv[1])
incoming = stream.makefile("rb")


def n(value):
    return struct.pack("<Q", value)


def s(text):
    data = text.encode()
    return n(len(data)) + data + bytes(-len(data) % 8)


def number():
    data = incoming.read(8)
    if len(data) < 8:
        sys.exit("the daemon has closed the connection")
    return struct.unpack("<Q", data)[0]


def string():
    length = number()
    return incoming.read(length + -length % 8)[:length].decode()


def fields():
    for _ in range(number()):
        if number() == 0:
            number()
        else:
            string()


def log():
    while True:
        tag = number()
        if tag == LAST:
            return
        if tag == NEXT:
            string()
        elif tag == START:
            number(), number(), number(), string(), fields(), number()
        elif tag == STOP:
            number()
        elif tag == RESULT:
            number(), number(), fields()
        elif tag == ERROR:
            string(), number(), string()
            sys.exit(string())
        else:
            sys.exit(f"unexpected log message {tag:#x}")


stream.sendall(n(0x6E697863) + n(1 << 8 | 37))
number(), number()
stream.sendall(n(0) + n(0))
string(), number(), log()
stream.sendall(n(19) + b"".join(n(v) for v in [0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0]))
log()
operation, arguments = sys.argv[2], sys.argv[3:]
if operation == "add-text":
    name, text, references = arguments[0], arguments[1].encode(), sorted(arguments[2:])
    stream.sendall(n(7) + s(name) + s("text:sha256") + n(len(references)) + b"".join(map(s, references)) + n(0))
    stream.sendall(n(len(text)) + text + n(0))
    log()
    print(string())
elif operation == "sign":
    stream.sendall(n(37) + s(arguments[0]) + n(1) + s(arguments[1]))
    log()
elif operation == "outputs":
    stream.sendall(n(41) + s(arguments[0]))
    log()
    for _ in range(number()):
        print(string(), string())
else:
    sys.exit(__doc__)
