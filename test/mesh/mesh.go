// Package mesh is the smallest mesh: a client's Envoy, a server's Envoy with an HTTP service behind it, and a steady
// stream of requests through both. The Envoys are real; their certificates and their trust come over SDS from whatever
// serves it at the sockets that they are given. The demo shows it to people, tests measure it.
package mesh

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"
)

// Sides are the two proxies, in the order in which everything lists them.
var Sides = [2]string{"client", "server"}

const (
	client = 0
	server = 1
)

// Config is what a mesh consists of.
type Config struct {
	// Envoy is the path of its binary.
	Envoy string
	// Dir is a folder for what the Envoys are told and what they log.
	Dir string
	// Client and Server say who the two are, and where they hear so.
	Client, Server Workload
	// Delta makes the Envoys speak the incremental form of SDS.
	Delta bool
}

// Workload is one side.
type Workload struct {
	// ID is the SPIFFE ID that the other side accepts, and no other.
	ID string
	// Socket is the path of the unix socket that serves SDS; at most 107 bytes.
	Socket string
}

// Mesh is a running one.
type Mesh struct {
	config  Config
	service *http.Server
	envoys  [2]*envoy
	url     string
}

// Start starts the service and both Envoys, and returns when both have their certificates and listen. It waits no
// longer than ctx, which has no say afterwards.
func Start(ctx context.Context, c Config) (*Mesh, error) {
	m := &Mesh{config: c}
	if err := m.start(ctx); err != nil {
		m.Stop()
		return nil, err
	}
	return m, nil
}

func (m *Mesh) start(ctx context.Context) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("the service behind the server's Envoy: %w", err)
	}
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		return err
	}
	m.service = &http.Server{Handler: http.HandlerFunc(greet), ReadHeaderTimeout: 5 * time.Second}
	go func() { _ = m.service.Serve(listener) }()

	m.envoys[server], err = startEnvoy(ctx, m.config, server, settings{
		Own: m.config.Server, Peer: m.config.Client.ID, Target: port,
	})
	if err != nil {
		return err
	}
	mtls, err := m.envoys[server].listenerPort(ctx)
	if err != nil {
		return err
	}
	m.envoys[client], err = startEnvoy(ctx, m.config, client, settings{
		Own: m.config.Client, Peer: m.config.Server.ID, Target: mtls,
	})
	if err != nil {
		return err
	}
	door, err := m.envoys[client].listenerPort(ctx)
	if err != nil {
		return err
	}
	m.url = "http://127.0.0.1:" + door + "/"
	return m.settle(ctx)
}

// settle waits until a request goes all the way: Envoy listens a moment before it knows its upstream's secrets.
func (m *Mesh) settle(ctx context.Context) error {
	t := m.NewTraffic()
	defer t.client.CloseIdleConnections()
	return m.envoys[client].Await(ctx, t.once)
}

// URL is where the client's Envoy takes requests.
func (m *Mesh) URL() string { return m.url }

// NewTraffic makes a stream of requests through the mesh. It expects that the service sees the client's identity.
func (m *Mesh) NewTraffic() *Traffic { return NewTraffic(m.url, greeting(m.config.Client.ID)) }

// Read asks both Envoys how they are.
func (m *Mesh) Read(ctx context.Context) ([2]Reading, error) {
	var readings [2]Reading
	for i := range m.envoys {
		r, err := m.ReadSide(ctx, i)
		if err != nil {
			return readings, err
		}
		readings[i] = r
	}
	return readings, nil
}

// ReadSide asks one of them; side is an index of Sides.
func (m *Mesh) ReadSide(ctx context.Context, side int) (Reading, error) {
	r, err := m.envoys[side].read(ctx)
	if err != nil {
		return r, fmt.Errorf("the %s's Envoy: %w", Sides[side], err)
	}
	return r, nil
}

// Stats are one side's statistics, for what Read does not tell. side is an index of Sides.
func (m *Mesh) Stats(ctx context.Context, side int) (Stats, error) { return m.envoys[side].Stats(ctx) }

// Ended is closed when one of the Envoys has ended by itself.
func (m *Mesh) Ended() <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-m.envoys[client].Done():
		case <-m.envoys[server].Done():
		}
	}()
	return ended
}

// Stop ends both Envoys and the service, and returns when they are gone.
func (m *Mesh) Stop() {
	for _, e := range m.envoys {
		if e != nil {
			e.Stop(5 * time.Second)
		}
	}
	if m.service != nil {
		_ = m.service.Close()
	}
}

// greet is the service: it greets the client by the identity that the server's Envoy verified, and by nothing else.
func greet(w http.ResponseWriter, r *http.Request) {
	for field := range strings.SplitSeq(r.Header.Get("X-Forwarded-Client-Cert"), ";") {
		if id, ok := strings.CutPrefix(field, "URI="); ok {
			fmt.Fprint(w, greeting(id))
			return
		}
	}
	http.Error(w, "no client certificate came with this request", http.StatusForbidden)
}

func greeting(id string) string { return "hello " + id }
