package parts

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
)

// The ports below those that Linux gives to connections (ip_local_port_range): nobody gets one of these by chance between the
// moment when it is found free and that when a server has it. Those from 30000 on are Kubernetes' node ports.
const firstPort, portCount = 20_000, 10_000

// lastPort begins elsewhere in each process, for several run at once.
var lastPort = func() *atomic.Uint32 {
	var n atomic.Uint32
	n.Store(uint32(os.Getpid()) * 97)
	return &n
}()

// FreePort returns a port of 127.0.0.1 that is free, and that this process has not had for the last thousands.
func FreePort() (int, error) {
	for range portCount {
		port := firstPort + int(lastPort.Add(1)%portCount)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("no port from 20000 to 30000 is free")
}
