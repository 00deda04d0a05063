package files

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// fromFiles is a client's identity, read anew for each handshake.
type fromFiles struct{ dir string }

// generation reads in one directory: what it finds belongs together.
func (f fromFiles) generation(read func(dir string) error) error {
	for {
		g, err := os.Readlink(filepath.Join(f.dir, "..data"))
		if err != nil {
			return err
		}
		err = read(filepath.Join(f.dir, g))
		if now, _ := os.Readlink(filepath.Join(f.dir, "..data")); errors.Is(err, fs.ErrNotExist) && now != g {
			continue // it was replaced long ago
		}
		return err
	}
}

func (f fromFiles) GetX509SVID() (s *x509svid.SVID, err error) {
	err = f.generation(func(dir string) (err error) {
		s, err = x509svid.Load(filepath.Join(dir, "cert-chain.pem"), filepath.Join(dir, "key.pem"))
		return err
	})
	return s, err
}

func (f fromFiles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (b *x509bundle.Bundle, err error) {
	err = f.generation(func(dir string) (err error) {
		b, err = x509bundle.Load(td, filepath.Join(dir, "root-cert.pem"))
		return err
	})
	return b, err
}

// traffic is a stream of requests to one peer, each with a handshake of its own.
type traffic struct {
	name string
	// once makes one request and returns the serials of the server's certificate and of the client's.
	once func(context.Context) (server, client string, err error)

	mu               sync.Mutex
	ok               int
	failed           []string
	servers, clients map[string]bool
}

func newTraffic(name string, once func(context.Context) (string, string, error)) *traffic {
	return &traffic{name: name, once: once, servers: map[string]bool{}, clients: map[string]bool{}}
}

// run sends requests until ctx ends, some 20 a second; what is under way then is not cut off.
func (r *traffic) run(ctx context.Context) {
	for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		server, client, err := r.once(one)
		cancel()
		r.mu.Lock()
		if err != nil {
			r.failed = append(r.failed, fmt.Sprintf("%s: %v", time.Now().Format(time.TimeOnly), err))
		} else {
			r.ok++
			r.servers[server], r.clients[client] = true, true
		}
		r.mu.Unlock()
	}
}

// count is how many certificates of either side were seen, and what failed.
func (r *traffic) count() (servers, clients, ok int, failed []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.servers), len(r.clients), r.ok, r.failed
}

// tlsTraffic speaks to an HTTP server as "web", and accepts the service account alone.
func (s *site) tlsTraffic(account string) *traffic {
	web := fromFiles{s.file("web/tls")}
	id := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/" + account)
	return newTraffic(account, func(ctx context.Context) (string, string, error) {
		config := tlsconfig.MTLSClientConfig(web, web, tlsconfig.AuthorizeID(id))
		var own string
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			svid, err := web.GetX509SVID()
			if err != nil {
				return nil, err
			}
			own = svid.Certificates[0].SerialNumber.Text(16)
			made := &tls.Certificate{PrivateKey: svid.PrivateKey}
			for _, c := range svid.Certificates {
				made.Certificate = append(made.Certificate, c.Raw)
			}
			return made, nil
		}
		conn, err := (&tls.Dialer{Config: config, NetDialer: &net.Dialer{}}).DialContext(ctx, "tcp", "127.0.0.1:"+s.ports[account])
		if err != nil {
			return "", "", err
		}
		defer conn.Close()
		if end, ok := ctx.Deadline(); ok {
			_ = conn.SetDeadline(end)
		}
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
			return "", "", err
		}
		answer, err := io.ReadAll(conn)
		if err != nil {
			return "", "", err
		}
		text := strings.ToLower(string(answer))
		if !strings.HasPrefix(text, "http/1.1 200") || !strings.Contains(text, own) {
			return "", "", fmt.Errorf("it answered %q to the certificate %s", answer, own)
		}
		secure, ok := conn.(*tls.Conn)
		if !ok {
			return "", "", fmt.Errorf("%T", conn)
		}
		return secure.ConnectionState().PeerCertificates[0].SerialNumber.Text(16), own, nil
	})
}

// expect checks what came of it.
func (r *traffic) expect(t *testing.T, rotations int) {
	t.Helper()
	servers, clients, ok, failed := r.count()
	t.Logf("%s: %d requests, %d failed; %d certificates of the server, %d of the client", r.name, ok, len(failed), servers, clients)
	if len(failed) > 0 {
		t.Errorf("%s: %d of %d requests failed, the first so: %s", r.name, len(failed), ok+len(failed), failed[0])
	}
	if servers <= rotations || clients <= rotations || ok < 100 {
		t.Errorf("%s: %d requests saw %d certificates of the server and %d of the client, want more than %d", r.name, ok, servers, clients, rotations)
	}
}
