package mesh

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"
	"time"

	"github.com/meshca/meshca/test/parts"
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

// envoy is a running proxy.
type envoy struct {
	process *parts.Process
	id      string
	admin   string // http://host:port
	// tls and http are the prefixes of its statistics, see readStats.
	tls, http string
}

// startEnvoy starts one and returns when it says that it is live: with its secrets, listening.
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
	file := filepath.Join(c.Dir, name+".yaml")
	if err := os.WriteFile(file, bootstrap.Bytes(), 0o600); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(c.Dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	address := filepath.Join(c.Dir, name+".admin")
	_ = os.Remove(address)
	process, err := parts.Start(parts.Command{
		Path: c.Envoy,
		// One worker each: two proxies, the CA and the requests share a laptop.
		Args: []string{"-c", file, "--admin-address-path", address, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"},
		Log:  log,
	})
	if err != nil {
		return nil, errors.Join(err, log.Close())
	}
	go func() {
		<-process.Done()
		_ = log.Close()
	}()
	e := &envoy{process: process, id: s.Own.ID, tls: "listener.mtls.", http: "http.requests."}
	if side == client {
		e.tls = "cluster.server."
	}
	if err := process.Await(ctx, func(ctx context.Context) error { return e.live(ctx, address) }); err != nil {
		process.Kill()
		return nil, fmt.Errorf("the %s's %w", name, err)
	}
	return e, nil
}

// live asks /ready; Envoy wrote the address of its admin port to a file.
func (e *envoy) live(ctx context.Context, addressFile string) error {
	address, err := os.ReadFile(addressFile)
	if err != nil {
		return err
	}
	e.admin = "http://" + strings.TrimSpace(string(address))
	answer, err := e.get(ctx, "/ready")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(answer)); got != "LIVE" {
		return fmt.Errorf("it says %s (it waits for its secrets from SDS)", got)
	}
	return nil
}

// listenerPort is the port that its one listener got.
func (e *envoy) listenerPort(ctx context.Context) (string, error) {
	answer, err := e.get(ctx, "/listeners?format=json")
	if err != nil {
		return "", err
	}
	var list struct {
		Statuses []struct {
			Address struct {
				Socket struct {
					Port int `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return "", fmt.Errorf("/listeners: %w", err)
	}
	if len(list.Statuses) != 1 {
		return "", fmt.Errorf("/listeners shows %d of them, want one", len(list.Statuses))
	}
	return strconv.Itoa(list.Statuses[0].Address.Socket.Port), nil
}

func (e *envoy) read(ctx context.Context) (Reading, error) {
	var r Reading
	certs, err := e.get(ctx, "/certs")
	if err != nil {
		return r, err
	}
	if err := r.readCertificate(certs, e.id); err != nil {
		return r, err
	}
	s, err := e.stats(ctx)
	if err != nil {
		return r, err
	}
	r.readStats(s, e.tls, e.http)
	return r, nil
}

func (e *envoy) stats(ctx context.Context) (Stats, error) {
	answer, err := e.get(ctx, "/stats?format=json")
	if err != nil {
		return nil, err
	}
	return parseStats(answer)
}

// get asks the admin port; what it says is bounded, like everything that is read.
func (e *envoy) get(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.admin+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", path, resp.Status, strings.TrimSpace(string(answer)))
	}
	return answer, nil
}
