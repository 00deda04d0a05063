package mesh

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"net"
	"text/template"
)

//go:embed *.yaml.tmpl
var templates embed.FS

// settings fill a side's template.
type settings struct {
	Own    Workload
	Peer   string // the SPIFFE ID of the other side
	Target string // the port on loopback that requests go on to
	API    string // SDS's form, in Envoy's words
}

// envoy is one side's proxy.
type envoy struct {
	*Proxy
	id string
	// tls and http are the prefixes of its statistics, see readStats.
	tls, http string
}

func startEnvoy(ctx context.Context, c Config, side int, s settings) (*envoy, error) {
	s.API = "GRPC"
	if c.Delta {
		s.API = "DELTA_GRPC"
	}
	name := Sides[side]
	all, err := template.ParseFS(templates, "*.yaml.tmpl")
	if err != nil {
		return nil, err
	}
	var bootstrap bytes.Buffer
	if err := all.ExecuteTemplate(&bootstrap, name+".yaml.tmpl", s); err != nil {
		return nil, err
	}
	e := &envoy{id: s.Own.ID, tls: "listener.mtls.", http: "http.requests."}
	if side == client {
		e.tls = "cluster.server."
	}
	if e.Proxy, err = StartProxy(ctx, c.Envoy, c.Dir, name, bootstrap.Bytes()); err != nil {
		return nil, fmt.Errorf("the %s's %w", name, err)
	}
	return e, nil
}

// listenerPort is the port that its one listener got.
func (e *envoy) listenerPort(ctx context.Context) (string, error) {
	all, err := e.Listeners(ctx)
	if err != nil {
		return "", err
	}
	if len(all) != 1 {
		return "", fmt.Errorf("/listeners shows %d of them, want one", len(all))
	}
	for _, address := range all {
		_, port, err := net.SplitHostPort(address)
		return port, err
	}
	return "", nil
}

func (e *envoy) read(ctx context.Context) (Reading, error) {
	var r Reading
	certs, err := e.Get(ctx, "/certs")
	if err != nil {
		return r, err
	}
	if err := r.readCertificate(certs, e.id); err != nil {
		return r, err
	}
	s, err := e.Stats(ctx)
	if err != nil {
		return r, err
	}
	r.readStats(s, e.tls, e.http)
	return r, nil
}
