package kubernetes

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"
)

// keySource is where a cluster's token keys are published.
type keySource interface {
	// read returns the JSON Web Key Set as it is now, and the issuer where the source knows it. It returns before ctx
	// ends, and at most maxKeySet+1 bytes.
	read(ctx context.Context) (jwks []byte, issuer string, err error)
	// period is how often it is to be read.
	period() time.Duration
	// String names it, for people.
	String() string
}

var (
	_ keySource = fileSource{}
	_ keySource = (*urlSource)(nil)
	_ keySource = (*api)(nil)
)

func newKeySource(s settings, api *api) (keySource, error) {
	switch {
	case s.keys.File != "":
		return fileSource{s.keys.File}, nil
	case s.keys.URL != "":
		return newURLSource(s)
	}
	return api, nil
}

// fileSource reads a file. It is read whole each time, so a symlink that now leads elsewhere (a ConfigMap) is no matter.
type fileSource struct{ path string }

func (f fileSource) period() time.Duration { return 5 * time.Second }
func (f fileSource) String() string        { return f.path }

func (f fileSource) read(context.Context) ([]byte, string, error) {
	file, err := os.Open(f.path)
	if err != nil {
		return nil, "", err
	}
	defer file.Close()
	raw, err := io.ReadAll(io.LimitReader(file, maxKeySet+1))
	return raw, "", err
}

type urlSource struct {
	url, caFile string
	timeout     time.Duration

	mu     sync.Mutex
	digest [sha256.Size]byte // of caFile, as client has it
	client *http.Client
}

func newURLSource(s settings) (*urlSource, error) {
	u := &urlSource{url: s.keys.URL, caFile: s.keys.CAFile, timeout: s.callTimeout}
	if _, err := u.current(); err != nil {
		return nil, err
	}
	return u, nil
}

// current is the client to read with: a new one when caFile has changed. An error comes with the last good one, if there
// is one.
func (u *urlSource) current() (*http.Client, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	var pem []byte
	if u.caFile != "" {
		var err error
		if pem, err = os.ReadFile(u.caFile); err != nil {
			return u.client, fmt.Errorf("jwks.caFile: %w", err)
		}
	}
	digest := sha256.Sum256(pem)
	if u.client != nil && digest == u.digest {
		return u.client, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if u.caFile != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return u.client, fmt.Errorf("jwks.caFile: %s holds no PEM certificate", u.caFile)
		}
	}
	u.client, u.digest = newKeyClient(conf, u.timeout), digest
	return u.client, nil
}

func newKeyClient(conf *tls.Config, timeout time.Duration) *http.Client {
	return &http.Client{
		Timeout: timeout,
		Transport: &http.Transport{
			Proxy:           http.ProxyFromEnvironment,
			TLSClientConfig: conf, ForceAttemptHTTP2: true,
			TLSHandshakeTimeout: timeout, IdleConnTimeout: time.Minute, MaxIdleConns: 2,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if r.URL.Scheme != "https" || len(via) >= 3 {
				return errors.New("a redirect away from https, or the fourth one")
			}
			return nil
		},
	}
}

func (u *urlSource) period() time.Duration { return 5 * time.Minute }
func (u *urlSource) String() string        { return u.url }

// read has the trust that caFile says now. While that cannot be used it keeps the last one, and tells of the file if the
// reading fails too.
func (u *urlSource) read(ctx context.Context) ([]byte, string, error) {
	client, stale := u.current()
	raw, err := u.get(ctx, client)
	if err != nil {
		return nil, "", errors.Join(err, stale)
	}
	return raw, "", nil
}

func (u *urlSource) get(ctx context.Context, client *http.Client) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", u.url, resp.Status)
	}
	return io.ReadAll(io.LimitReader(resp.Body, maxKeySet+1))
}

func (a *api) period() time.Duration { return 5 * time.Minute }
func (a *api) String() string        { return "the API server" }

// read has the API server tell its issuer and keys (OpenID discovery, role system:service-account-issuer-discovery).
// The keys are read at the server's own path, not at the document's jwks_uri: that one is for parties elsewhere.
func (a *api) read(ctx context.Context) (jwks []byte, issuer string, err error) {
	raw, err := a.raw(ctx, "discovery", "/.well-known/openid-configuration")
	if err != nil {
		return nil, "", err
	}
	var doc struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil || doc.Issuer == "" {
		return nil, "", errors.New("the API server's discovery document names no issuer")
	}
	jwks, err = a.raw(ctx, "jwks", "/openid/v1/jwks")
	return jwks, doc.Issuer, err
}
