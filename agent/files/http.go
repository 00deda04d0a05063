package files

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// HTTP posts an empty request to a server on this machine.
type HTTP struct {
	// URL is where to, http or https; its host is localhost or a loopback address. Required.
	URL string
	// Socket is the unix socket of the server; empty: it listens where the URL says.
	Socket string
	// CAFile is what its certificate is verified by (PEM); empty: the system's authorities.
	CAFile string
	// Timeout bounds the whole exchange. 30 s where it is 0, at most 5 min.
	Timeout time.Duration
}

var _ teller = HTTP{}

func (h *HTTP) check() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf("http: "+format, args...)) }
	u, err := url.Parse(h.URL)
	switch {
	case h.URL == "":
		wrong("url is missing")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		wrong("url %.80q is not http://host/path or https://host/path", h.URL)
	case u.User != nil:
		wrong("url holds a password: a server on this machine can tell who connects to a unix socket; use socket")
	case !isLoopback(u.Hostname()):
		wrong("url: %q is not this machine: localhost, 127.0.0.1 or [::1]", u.Hostname())
	}
	for _, p := range []struct{ key, path string }{{"socket", h.Socket}, {"caFile", h.CAFile}} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			wrong("%s %q is not an absolute path", p.key, p.path)
		}
	}
	if h.CAFile != "" && (u == nil || u.Scheme != "https") {
		wrong("caFile goes with https")
	}
	if err := checkTimeout(h.Timeout); err != nil {
		wrong("%w", err)
	}
	return errors.Join(errs...)
}

func isLoopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// String says what is done.
func (h HTTP) String() string { return "POST " + h.URL }

func (h HTTP) tell(ctx context.Context, secrets []string) error {
	ctx, cancel := context.WithTimeout(ctx, timeoutOf(h.Timeout))
	defer cancel()
	transport, err := h.transport()
	if err != nil {
		return err
	}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, h.URL, http.NoBody)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, maxSaid))
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("%s answered %d: %s", h.URL, answer.StatusCode, said(string(body), secrets))
	}
	return err
}

// transport speaks to this machine alone: no proxy, no redirect, and a name that resolves elsewhere is not followed.
func (h HTTP) transport() (*http.Transport, error) {
	dialer := net.Dialer{Control: func(_, address string, _ syscall.RawConn) error {
		if to, err := netip.ParseAddrPort(address); err == nil && !to.Addr().IsLoopback() {
			return fmt.Errorf("%s is not this machine", to.Addr())
		}
		return nil
	}}
	t := &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10}
	if h.Socket != "" {
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", h.Socket)
		}
	}
	if h.CAFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(h.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", h.CAFile)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	return t, nil
}
