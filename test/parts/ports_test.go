package parts_test

import (
	"fmt"
	"net"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// TestFreePort: no port comes twice, or while somebody has it.
func TestFreePort(t *testing.T) {
	seen := map[int]bool{}
	for range 500 {
		port, err := parts.FreePort()
		if err != nil || seen[port] {
			t.Fatalf("%d, %v, twice: %v", port, err, seen[port])
		}
		seen[port] = true
	}
	port, err := parts.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	if taken, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1)); err == nil { // else somebody has it already
		defer taken.Close()
	}
	if next, err := parts.FreePort(); err != nil || next == port+1 {
		t.Errorf("%d, %v: that is taken", next, err)
	}
}
