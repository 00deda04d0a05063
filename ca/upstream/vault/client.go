package vault

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"
)

const (
	// maxAnswer bounds an answer of Vault's: a mount of 100 issuers lists itself in 20 KiB, a chain takes 10 KiB.
	maxAnswer = 1 << 20
	// maxFile bounds what is read of a credential or certificate file.
	maxFile = 1 << 20
	// dialTimeout bounds a TCP connection, and then its TLS handshake.
	dialTimeout = 10 * time.Second
)

var errTooLong = fmt.Errorf("the answer is longer than %d KiB", maxAnswer>>10)

// newClient makes a client without a token. It reads the files that TLS needs, so each login makes one. Its connections
// are closed by the returned function.
func newClient(c Config, skew *skew) (*api.Client, func(), error) {
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pool, err := readPool(c.CAFile)
		if err != nil {
			return nil, nil, fmt.Errorf("upstream.vault.caFile: %w", err)
		}
		tlsConfig.RootCAs = pool
	}
	if x := c.Auth.Cert; x != nil {
		cert, err := readKeyPair(x)
		if err != nil {
			return nil, nil, fmt.Errorf("upstream.vault.auth.cert: %w", err)
		}
		tlsConfig.Certificates = []tls.Certificate{cert}
	}
	transport := &http.Transport{
		DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    dialTimeout,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConns:           4,
		IdleConnTimeout:        90 * time.Second,
		ForceAttemptHTTP2:      true,
	}
	client, err := api.NewClient(&api.Config{
		Address: c.Address,
		HttpClient: &http.Client{
			Transport: bounded{transport, skew, c.Timeout.Duration},
			// The library follows a standby's one redirect itself, never from https to http.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		// No retry: a signing that was answered with an error may have taken effect.
		MaxRetries: 0,
	})
	if err != nil {
		return nil, nil, &libraryError{err}
	}
	// The library has looked into the environment by now. Settings come from the configuration alone.
	client.ClearToken()
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	if c.Namespace != "" {
		client.SetNamespace(c.Namespace)
	}
	return client, transport.CloseIdleConnections, nil
}

// libraryError is the library's own.
type libraryError struct{ error }

func (e *libraryError) Unwrap() error { return e.error }

// bounded is a transport that bounds each exchange in time and each answer in length, and reads Vault's clock off it.
// The library's watcher calls without a deadline, and the library leaves the answer of a standby unread: so answers are
// read here.
type bounded struct {
	next    http.RoundTripper
	skew    *skew
	timeout time.Duration
}

// RoundTrip makes one call.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(r.Context(), b.timeout)
	defer cancel()
	began := time.Now()
	resp, err := b.next.RoundTrip(r.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b.skew.measure(resp.Header.Get("Date"), began, time.Now())
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxAnswer {
		return nil, errTooLong
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// skew is how far Vault's clock is ahead of ours, as its last answer showed.
type skew struct{ last atomic.Pointer[measurement] }

type measurement struct {
	ahead time.Duration
	at    time.Time
}

// measure takes the Date of an answer (RFC 9110 §6.6.1: whole seconds) for a moment between question and answer. What
// could as well be the way's delay counts as none.
func (s *skew) measure(date string, began, ended time.Time) {
	shown, err := http.ParseTime(date)
	if err != nil {
		return
	}
	m := &measurement{at: ended}
	switch earliest, latest := shown, shown.Add(time.Second); {
	case earliest.After(ended):
		m.ahead = earliest.Sub(ended.Round(0))
	case latest.Before(began):
		m.ahead = latest.Sub(began.Round(0))
	}
	s.last.Store(m)
}

// ahead is zero while nothing was measured.
func (s *skew) ahead() time.Duration {
	if m := s.last.Load(); m != nil {
		return m.ahead
	}
	return 0
}

func readPool(path string) (*x509.CertPool, error) {
	certs, err := readCertificates(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool, nil
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

func readKeyPair(x *CertConfig) (tls.Certificate, error) {
	cert, err := readFile(x.CertFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readFile(x.KeyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s and %s: %w", x.CertFile, x.KeyFile, err)
	}
	return pair, nil
}

// readSecret reads a credential: one line, without the space around it.
func readSecret(path string) (secret, error) {
	data, err := readFile(path)
	if err != nil {
		return secret{}, err
	}
	data = bytes.TrimSpace(data)
	switch {
	case len(data) == 0:
		return secret{}, fmt.Errorf("%s is empty", path)
	case len(data) > 64<<10 || bytes.ContainsFunc(data, func(r rune) bool { return r <= ' ' || r > '~' }):
		return secret{}, fmt.Errorf("%s does not hold one line of printable characters", path)
	}
	return newSecret(string(data)), nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d KiB", path, maxFile>>10)
	}
	return data, nil
}

// isTLSTrust reports whether a call failed because Vault's certificate was not trusted: then the CA file may have been
// replaced since the client was made.
func isTLSTrust(err error) bool {
	var verification *tls.CertificateVerificationError
	return errors.As(err, &verification)
}
