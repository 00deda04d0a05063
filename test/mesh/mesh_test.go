package mesh_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	"github.com/meshca/meshca/api/sds"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/mesh"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/pki"
)

// TestMesh rotates both sides under traffic, sees it in Envoy's own numbers, and then proves that what it measures can
// fail: an identity that the other side does not accept gets not one request through.
func TestMesh(t *testing.T) {
	for name, delta := range map[string]bool{"state-of-the-world": false, "delta": true} {
		t.Run(name, func(t *testing.T) { rotateUnderTraffic(t, delta) })
	}
}

func rotateUnderTraffic(t *testing.T, delta bool) {
	root, err := pki.NewRoot("mesh.test")
	if err != nil {
		t.Fatal(err)
	}
	sides := [2]*workload{serve(t, root, "spiffe://mesh.test/client"), serve(t, root, "spiffe://mesh.test/server")}
	for _, w := range sides {
		w.rotate(t, w.id)
	}
	start, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m, err := mesh.Start(start, mesh.Config{
		Envoy: parts.Path(t, "envoy"), Dir: t.TempDir(), Delta: delta,
		Client: mesh.Workload{ID: sides[0].id, Socket: sides[0].socket},
		Server: mesh.Workload{ID: sides[1].id, Socket: sides[1].socket},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Stop()
	before := read(t, m)

	const rotations, rate = 4, 100
	traffic, end := m.NewTraffic(), make(chan struct{})
	running, stop := context.WithCancel(t.Context())
	go func() { defer close(end); traffic.Run(running, rate) }()
	for range rotations {
		for i, w := range sides {
			serial := w.rotate(t, w.id)
			await(t, m, i, func(r mesh.Reading) bool { return r.Serial == serial })
		}
		time.Sleep(200 * time.Millisecond) // traffic on these certificates
	}
	stop()
	<-end

	after := read(t, m)
	if traffic.Failed() != 0 || traffic.OK() < 50 {
		t.Errorf("requests ok %d, failed %d (last: %s); want at least 50 and none", traffic.OK(), traffic.Failed(), traffic.Fault())
	}
	if made := after[0].Handshakes - before[0].Handshakes; made < traffic.OK() {
		t.Errorf("%d handshakes for %d requests, want one each", made, traffic.OK())
	}
	for i := range sides {
		if got := after[i].Contexts - before[i].Contexts; got != rotations {
			t.Errorf("the %s's context was replaced %d times, want %d", mesh.Sides[i], got, rotations)
		}
		if got := after[i].OK - before[i].OK; got != traffic.OK() {
			t.Errorf("the %s's Envoy counts %d good requests, want %d", mesh.Sides[i], got, traffic.OK())
		}
		if after[i].Rejected != 0 || after[i].HandshakeFaults != before[i].HandshakeFaults || after[i].Failed != before[i].Failed {
			t.Errorf("the %s's Envoy counts faults: %+v", mesh.Sides[i], after[i])
		}
	}
	intrude(t, m, sides[0])
}

// intrude gives the client an identity of the same root that the server must not accept.
func intrude(t *testing.T, m *mesh.Mesh, client *workload) {
	t.Helper()
	client.rotate(t, "spiffe://mesh.test/somebody-else")
	await(t, m, 1, func(r mesh.Reading) bool {
		traffic := m.NewTraffic()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		traffic.Run(ctx, 50)
		return traffic.OK() == 0 && traffic.Failed() > 0 && traffic.Fault() != "" && r.HandshakeFaults > 0
	})
}

func read(t *testing.T, m *mesh.Mesh) [2]mesh.Reading {
	t.Helper()
	r, err := m.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func await(t *testing.T, m *mesh.Mesh, side int, met func(mesh.Reading) bool) {
	t.Helper()
	var last mesh.Reading
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if r, err := m.ReadSide(t.Context(), side); err == nil {
			if last = r; met(r) {
				return
			}
		}
	}
	t.Fatalf("the %s's Envoy did not come to it: %+v", mesh.Sides[side], last)
}

// workload is one side's SDS server.
type workload struct {
	root       *pki.Root
	id, socket string
	current    *rotation.Current[*sds.Secrets]
}

func serve(t *testing.T, root *pki.Root, id string) *workload {
	t.Helper()
	dir, err := os.MkdirTemp("", "mesh") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &workload{root, id, filepath.Join(dir, "sds.sock"), rotation.NewCurrent[*sds.Secrets](nil)}
	listener, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	service, err := sds.New(sds.Config{Source: func(context.Context) (sds.Source, error) { return sds.SourceFunc(w.current.Get), nil }})
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(server, service)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	return w
}

// rotate serves a new certificate for the identity and returns its serial as Envoy writes it.
func (w *workload) rotate(t *testing.T, id string) string {
	t.Helper()
	svid, err := w.root.SVID(spiffeid.RequireFromString(id).Path(), 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	secrets, err := sds.NewSecrets(sds.SecretsConfig{
		SVIDs: []*x509svid.SVID{svid}, Bundles: []*spiffebundle.Bundle{w.root.Bundle(1)},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.current.Set(secrets)
	return fmt.Sprintf("%x", svid.Certificates[0].SerialNumber.Bytes())
}
