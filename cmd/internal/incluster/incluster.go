// Package incluster calls the API server of the cluster that this program's pod runs in, as the pod's service account. It
// is for who makes one small call now and then, and is not to bring client-go along for it.
package incluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// accountDir is where every pod finds its service account.
	accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"
	// maxAnswer bounds what is read of an answer: more than etcd takes of an object.
	maxAnswer = 8 << 20
	timeout   = 10 * time.Second
)

// Client makes the calls. Token and certificate are read at each of them: kubelet replaces both.
type Client struct{ base, dir string }

// New is for a program in a pod: kubelet tells every container where the API server is.
func New() (*Client, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this is no pod of a Kubernetes cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
	}
	return At("https://"+net.JoinHostPort(host, port), accountDir), nil
}

// At is a client for the API server at base, with token and ca.crt in dir.
func At(base, dir string) *Client { return &Client{base, dir} }

// StatusError is an answer other than success.
type StatusError struct {
	// Code is HTTP's.
	Code int
	// Message is the API server's.
	Message string
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("the API server answers %d: %s", e.Code, e.Message)
}

// Do makes one call, within ten seconds, and returns the answer's body. Where the API server says no the error is a
// *StatusError.
func (c *Client) Do(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	token, err := os.ReadFile(filepath.Join(c.dir, "token"))
	if err != nil {
		return nil, fmt.Errorf("the service account's token: %w", err)
	}
	r.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	r.Header.Set("Accept", "application/json")
	r.Header.Set("User-Agent", "meshca")
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	roots := x509.NewCertPool()
	pem, err := os.ReadFile(filepath.Join(c.dir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("the API server's certificate authority: %w", err)
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(c.dir, "ca.crt"))
	}
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	answer, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if answer.StatusCode/100 != 2 {
		return nil, &StatusError{answer.StatusCode, reason(text)}
	}
	return text, nil
}

// reason is the message of a metav1.Status, or the beginning of what came instead of one.
func reason(text []byte) string {
	var status struct{ Message string }
	if err := json.Unmarshal(text, &status); err == nil && status.Message != "" {
		return status.Message
	}
	return strings.TrimSpace(string(text[:min(len(text), 200)]))
}
