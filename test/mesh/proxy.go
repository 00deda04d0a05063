package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/meshca/meshca/test/parts"
)

// Proxy is a running Envoy, whatever its configuration makes of it.
type Proxy struct {
	*parts.Process
	admin string // http://host:port
}

// StartProxy starts an Envoy with this configuration and returns when it says that it is live: with its secrets,
// listening. What it is told and what it logs goes to files of dir that are called name. It waits no longer than ctx.
func StartProxy(ctx context.Context, binary, dir, name string, bootstrap []byte) (*Proxy, error) {
	file := filepath.Join(dir, name+".yaml")
	if err := os.WriteFile(file, bootstrap, 0o600); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	address := filepath.Join(dir, name+".admin")
	_ = os.Remove(address)
	process, err := parts.Start(parts.Command{
		Path: binary,
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
	p := &Proxy{Process: process}
	if err := process.Await(ctx, func(ctx context.Context) error { return p.live(ctx, address) }); err != nil {
		process.Kill()
		return nil, err
	}
	return p, nil
}

// live asks /ready; Envoy wrote the address of its admin port to a file.
func (p *Proxy) live(ctx context.Context, addressFile string) error {
	address, err := os.ReadFile(addressFile)
	if err != nil {
		return err
	}
	p.admin = "http://" + strings.TrimSpace(string(address))
	answer, err := p.Get(ctx, "/ready")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(answer)); got != "LIVE" {
		return fmt.Errorf("it says %s (it waits for its secrets from SDS)", got)
	}
	return nil
}

// Listeners are where its listeners listen, by their names.
func (p *Proxy) Listeners(ctx context.Context) (map[string]string, error) {
	answer, err := p.Get(ctx, "/listeners?format=json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Statuses []struct {
			Name    string `json:"name"`
			Address struct {
				Socket struct {
					Port int `json:"port_value"`
				} `json:"socket_address"`
			} `json:"local_address"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return nil, fmt.Errorf("/listeners: %w", err)
	}
	all := make(map[string]string, len(list.Statuses))
	for _, s := range list.Statuses {
		all[s.Name] = net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Address.Socket.Port))
	}
	return all, nil
}

// Stats are all its statistics.
func (p *Proxy) Stats(ctx context.Context) (Stats, error) {
	answer, err := p.Get(ctx, "/stats?format=json")
	if err != nil {
		return nil, err
	}
	return parseStats(answer)
}

// Get asks the admin port; what it says is bounded, like everything that is read.
func (p *Proxy) Get(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.admin+path, nil)
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
